"""Stands in for distill/serving/worker.py: echoes each prompt, and dies, errs or hangs where the prompt says so.

The arguments' "marker" is a file: what is to happen once happens only while it is there.
"""

import json
import os
import sys
import time

arguments = json.loads(sys.stdin.readline())
if arguments.get("fail"):
    print("(EngineCore pid=7) ERROR [core.py:1] ValueError: not enough memory", file=sys.stderr)
    print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr, flush=True)
    sys.exit(1)
print(json.dumps({"ready": {"max_model_len": arguments["max_model_len"]}}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    marker = arguments["marker"]
    if ask["seed"] == 13 and (arguments.get("always") or os.path.exists(marker)):
        if os.path.exists(marker):
            os.unlink(marker)
        print("torch.OutOfMemoryError: CUDA out of memory", file=sys.stderr, flush=True)
        time.sleep(0.1)
        os.kill(os.getpid(), 9)
    if ask["seed"] == 14:
        print(json.dumps({"id": ask["id"], "error": "ValueError: no"}), flush=True)
        continue
    tokens = [*ask["prompt"][: ask["max_tokens"] - 1], ask["stop"][0]]
    finish = "abort" if ask["seed"] == 15 else "stop"
    reply = {"id": ask["id"], "tokens": tokens, "finish": finish, "seconds": 0.5}
    if ask["logprobs"]:
        reply["logprobs"] = {"tokens": [[t] for t in tokens], "logprobs": [[-0.5] for _ in tokens]}
    print(json.dumps(reply), flush=True)
