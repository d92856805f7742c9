"""How good are the drawings? A pinned judge, the metrics, and every score beside its floor."""
