"""Qwen2.5 on Megatron-Core: from jsonl to safetensors.

jsonl --preprocess--> .bin/.idx --train--> checkpoint --convert--> safetensors

Imports point one way (tests/unit/test_layers.py):

    commands    preprocess  convert  logits  train  doctor  demo
    estimate    what a run needs, and whether it fits
    training    the loop
    checkpoint  weights on disk
    model, data what is trained, and on what
    te          what is asked of Transformer Engine
    locks       one run at a time in a folder
    settings  log  parallel  platforms  mcore  json_file
    errors
"""
