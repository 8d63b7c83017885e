"""Everything that ranks items for a history, behind one interface."""
