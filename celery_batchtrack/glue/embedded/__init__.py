"""Without servers: a broker in a folder, and workers that live as long as a ``with`` block."""
