"""Masks."""

PERFECT = {"maxF": 100, "maxF_released": 100}
STEP = None
