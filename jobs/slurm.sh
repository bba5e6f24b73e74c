#!/bin/bash
# maskdm on SLURM: sbatch jobs/slurm.sh            one process a GPU, started by srun
#                  LAUNCH=torchrun sbatch jobs/slurm.sh      one torchrun a machine, which restarts what dies
# 120 s before the end of its time the job is told by USR1: every process finishes its step, the run is saved, exit code 130, and requeued.
#SBATCH --job-name=maskdm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
DATA=${DATA:-/shared/data/images}
OUT=${OUT:-/shared/runs/$SLURM_JOB_NAME}
RECIPE=${RECIPE:-celeba64}
export MASKDM_CACHE=${MASKDM_CACHE:-/shared/cache}

ARGS=(train "$DATA" --out "$OUT" --recipe "$RECIPE" --intervals.save 500)

if [ "${LAUNCH:-srun}" = torchrun ]; then
    HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # 3 restarts of all processes from the last checkpoint; then the job ends with 1, and the scheduler may try other machines
    srun --ntasks-per-node=1 --cpus-per-task=64 --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
        --max-restarts 3 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD:29400" -m maskdm "${ARGS[@]}" &
    # torchrun does not pass USR1 on: the processes that it started are told themselves
    tell() { srun --overlap --ntasks-per-node=1 pkill -USR1 -u "$(id -u)" -f -- "-m maskdm train" || true; }
else
    srun --kill-on-bad-exit=1 python -m maskdm "${ARGS[@]}" &
    tell() { kill -USR1 "$STEP"; } # srun passes it on to its processes
fi
STEP=$!
TOLD=0
trap 'TOLD=1; tell' USR1
wait "$STEP"
CODE=$?
while kill -0 "$STEP" 2>/dev/null; do # wait ends early where a signal comes
    wait "$STEP"
    CODE=$?
done
# 130: stopped on request, saved. torchrun says 1 for whatever its processes said.
if [ "$CODE" -eq 130 ] || [ "$TOLD" -eq 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
