"""Qwen2.5 on Megatron-Core: from jsonl to safetensors.

jsonl --preprocess--> .bin/.idx --train--> checkpoint --convert--> safetensors

Imports point one way (tests/unit/test_layers.py):

    commands    preprocess  convert  logits  train  doctor  demo
    estimate    what a run needs, and whether it fits
    training    the loop
    checkpoint  weights on disk
    model, data what is trained, and on what
    locks       one run at a time in a folder
    progress    a bar for long work on files
    settings  log  parallel  platforms  engine  json_file  folders  atomic_file
    errors  start
"""

import sys

if sys.hexversion < 0x030A0000:  # what follows is not read by an older one
    version = ".".join(str(number) for number in sys.version_info[:3])
    sys.stderr.write("error: " + sys.executable + " is Python " + version + ": set PYTHON to Python 3.10 or later\n")
    sys.exit(2)

from common import start

sys.excepthook = start.report_missing_package
start.use_utf8()
start.enter_working_dir()
