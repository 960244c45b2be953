"""Links in closed form: ridge regressions instead of training steps."""
