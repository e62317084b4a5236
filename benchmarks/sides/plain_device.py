"""What users write first: a loop that publishes at QoS 1 with paho. Arguments as for `telemetry_device.py`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from paho.mqtt.client import CallbackAPIVersion, Client

port, folder, name = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
total, rate = int(sys.argv[4]), float(sys.argv[5])
path = folder / f"{name}.kept"
lines = path.read_bytes().split(b"\n") if path.exists() else []
start = int(lines[-2]) + 1 if len(lines) > 1 else 0
out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
client = Client(CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
client.connect_async("127.0.0.1", port)
client.loop_start()
for number in range(start, total):
    last = client.publish(f"plain/{name}", json.dumps({"number": number, "pad": "x" * 800}), qos=1)
    os.write(out, b"%d\n" % number)
    time.sleep(1 / rate)
end = time.monotonic() + 20
while not last.is_published() and time.monotonic() < end:
    time.sleep(0.1)
client.disconnect()
client.loop_stop()
