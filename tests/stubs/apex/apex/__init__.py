"""Stands in for a vendor's apex: its fused Adam's interface, in plain torch."""
