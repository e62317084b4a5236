"""How a run goes: stages that run only where something changed, in one process or several."""
