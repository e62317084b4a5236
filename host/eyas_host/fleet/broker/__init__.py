"""An MQTT broker with its own authority: the kit, certificates, enrolment, an embedded one for a first try."""
