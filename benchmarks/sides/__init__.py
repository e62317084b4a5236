"""The sides of `frame_loop.py`: each a program of its own that answers the same encoded frames, turn by turn.

A side is started as `python SIDE MODEL FRAMES.npz ...` and says `ready` when its model is loaded and warm. For each
line `turn N` on its standard input it answers N frames and prints {"frames", "wall_s", "cpu_s", "labels"} as JSON.
"""
