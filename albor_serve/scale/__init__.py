"""Past one machine: several engines behind one address (extra `ray`; see docs/scale.md)."""
