"""On the PYTHONPATH of a test's job: no socket leaves this machine, and an attempt is noted in $NANOCHAT_BASE_DIR/reached_out.

The preset tiny pretrains for $TINY_STEPS steps where a test sets that.
"""

import os
import socket

_connect = socket.socket.connect


def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        host = socket.gethostname()
        if address[0] not in (host, socket.gethostbyname(host)):
            with open(os.path.join(os.environ["NANOCHAT_BASE_DIR"], "reached_out"), "a") as file:
                file.write(f"{address}\n")
            raise OSError(101, "Network is unreachable")
    return _connect(self, address)


socket.socket.connect = connect
if os.environ.get("TINY_STEPS"):
    from nanochat.options.presets import PRESETS

    PRESETS["tiny"]["train base"]["num_iterations"] = int(os.environ["TINY_STEPS"])
