"""From exported models to served answers: the cascade of the paper behind OpenAI's `/v1/completions`.

    prompt --contexts--> sketch of the context --engines--> n sketches --cascade--> winner, route --engines--> answers
    answers --openai_schema, http--> HTTP, deployed by on_ray; --completers--> `complete(prompts, n)` for evaluation

Import the modules directly: this file stays empty so that reading a schema does not load torch.
"""
