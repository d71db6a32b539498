"""This project beside what one would use instead, in one run on one machine."""
