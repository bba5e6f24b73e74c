"""Other people's networks, timed beside ours: `python -m benchmarks.peers --maskdm PATH --uvit PATH --maskdit PATH --sit PATH`."""
