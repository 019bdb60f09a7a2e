"""Schedules as pure data: orders, rules, a simulator, timelines. Standard library and numpy alone."""
