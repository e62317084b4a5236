"""What users write first: paho at QoS 1, each message into SQLite as it comes. `plain_collector.py PORT DATABASE`."""

from __future__ import annotations

import json
import sqlite3
import sys
from typing import Any

from paho.mqtt.client import CallbackAPIVersion, Client

database = sqlite3.connect(sys.argv[2], timeout=10)
database.execute("PRAGMA journal_mode=WAL")
database.execute("CREATE TABLE IF NOT EXISTS plain (device TEXT, number INTEGER)")


def on_message(client: Client, userdata: object, message: Any) -> None:
    """Store it."""
    number = json.loads(message.payload)["number"]
    database.execute("INSERT INTO plain VALUES (?, ?)", (message.topic.split("/")[1], number))
    database.commit()


client = Client(CallbackAPIVersion.VERSION2, client_id="plain-collector", clean_session=False)
client.on_message = on_message
client.on_connect = lambda c, *_: c.subscribe("plain/#", qos=1)
client.connect_async("127.0.0.1", int(sys.argv[1]))
client.loop_forever(retry_first_connection=True)
