"""Configs of XTuner 0.1 as configs of mmft."""
