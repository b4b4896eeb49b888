"""From packed tokens to a model: one loop for base, XL, sketcher and generator, which differ only by recipe.

`config` declares a run, `inputs` checks it, `presets` and `models` make the model, `sampling` says which rows a step
reads, `schedule` and `step` hold the arithmetic, `deepspeed_engine` the engine. `worker` combines them into one rank's
work, `checkpoints`, `records` and `export` write what is kept, `on_ray` places the ranks.
"""
