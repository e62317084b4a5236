"""What happens with a prediction: a retained MQTT topic, a webhook or a pin, each behind a debounced rule.

rule.py       which predictions count, k of n frames, hysteresis and minimum on-time
answer.py     what an output delivers
delivery.py   newest-wins mailbox with a supervised thread: an output never holds up the frame loop
mqtt.py, webhook.py, gpio.py    the kinds
"""
