"""An MQTT broker with mutual TLS: mosquitto kit, certificates, enrolment; an embedded broker for a first try."""
