"""Lightning's training loop while ranks run at their own speed: counters, limits, schedules, metrics."""
