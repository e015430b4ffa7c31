"""Stands in for `vllm serve`: answers /health, has a child as vLLM has, and dies or hangs as its arguments say.

stub_server.py PORT LOG [--fail] [--deaf] [--hang]: LOG gets a line "<pid> <pid of the child>" at each start.
"""

import http.server
import os
import signal
import subprocess
import sys
import time

port, log = int(sys.argv[1]), sys.argv[2]
print("stub: starting", flush=True)
if "--fail" in sys.argv:
    print("vllm serve: error: unrecognized arguments: --nonsense", file=sys.stderr, flush=True)
    sys.exit(2)
_CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", _CHILD])
if "--deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Handler.asked += 1
        if "--hang" in sys.argv and Handler.asked > 2:
            time.sleep(600)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
with open(log, "a") as file:
    file.write(f"{os.getpid()} {child.pid}\n")
server.serve_forever()
