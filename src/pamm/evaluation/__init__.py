"""Measuring trained networks: metrics at both resolutions, rankings, gains over baselines, reports, boundaries."""
