"""What a network looks like: its plan, its filters and features, and why it said what it said."""
