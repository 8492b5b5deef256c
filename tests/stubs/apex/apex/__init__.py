"""A stub of a vendor's apex: its fused Adam's interface, in plain torch."""
