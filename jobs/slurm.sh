#!/bin/bash
# maskdm on SLURM: sbatch jobs/slurm.sh            one process a GPU, started by srun
#                  LAUNCH=torchrun sbatch jobs/slurm.sh      one torchrun a machine, which restarts what dies
# 120 s before the end of its time the steps of the job get USR1: the run is saved, exit code 130, and the job is requeued. torchrun
# passes it on, and says 1 for whatever its processes said: there every failure is requeued, ten times at most.
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
    srun --ntasks-per-node=1 --cpus-per-task=64 --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
        --max-restarts 3 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 100 \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD:29400" -m maskdm "${ARGS[@]}"
    CODE=$?
    AGAIN=$((CODE != 0 && ${SLURM_RESTART_COUNT:-0} < 10))
else
    srun --kill-on-bad-exit=0 python -m maskdm "${ARGS[@]}" # 0: all save before any is ended; a death ends the others in 60 s
    CODE=$?
    AGAIN=$((CODE == 130))
fi
if [ "$AGAIN" -eq 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
