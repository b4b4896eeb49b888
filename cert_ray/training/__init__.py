"""From packed tokens to a model: one loop for the base, XL, sketcher and generator, which differ by recipe only.

`config` declares a run, `inputs` checks it, `presets` and `models` make what is trained, `sampling` says which rows a
step reads, `schedule` and `step` hold the arithmetic, `deepspeed_engine` the engine, `worker` ties them into one rank's
work, `checkpoints`, `records` and `export` are what is kept, `on_ray` places the ranks.
"""
