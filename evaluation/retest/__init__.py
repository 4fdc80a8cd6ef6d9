"""How well features, readouts and predicted ages repeat in people who are scanned several times or on several scanners."""
