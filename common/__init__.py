"""Qwen2.5 on Megatron-Core: from jsonl to safetensors.

jsonl --preprocess--> .bin/.idx --train--> checkpoint --convert--> safetensors --chat--> answers

Imports point down (tests/unit/test_layers.py); docs/architecture.md shows the rooms within the parts:

    commands     preprocess  convert  logits  train  watch  chat  evaluate  doctor  adopt  demo
    tune         layouts tried on the GPUs at hand
    estimate     memory, layouts that fit, tokens/s
    report       a page on runs
    training     plan, ranks, loop, state
    inference    an exported model and its prompts
    checkpoint   formats, conversion, verification
    model, data  shape and layers; jsonl to micro-batches
    locks        one writer per folder
    progress     a bar for long work on files
    settings  parallel  platforms  engine  json_file  folders
    hub          a model's id where a folder is expected
    log  ports
    errors  start  files
"""

import sys

if sys.hexversion < 0x030A0000:  # older versions cannot parse what follows
    version = ".".join(str(number) for number in sys.version_info[:3])
    sys.stderr.write("error: " + sys.executable + " is Python " + version + ": set PYTHON to Python 3.10 or later\n")
    sys.exit(2)

from common import start

sys.excepthook = start.report_missing_package
start.use_utf8()
start.enter_working_dir()
start.pause_collection()
