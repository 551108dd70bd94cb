"""Launchers that restart dead workers, where Lightning's launchers end all processes."""
