"""Which bundle is current: slots, and the golden check that admits one."""
