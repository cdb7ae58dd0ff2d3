"""Print the plans of recurrent passes as JSON.

Usage: python plans.py EXTENSION FILE; the file holds [[layer, backward, chip], ...], see `rnn_plan`.
"""

import importlib.util
import json
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("fastlm._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(json.dumps([native.cuda.rnn_plan(tuple(layer), backward, tuple(chip))
                  for layer, backward, chip in json.loads(Path(sys.argv[2]).read_text())]))
