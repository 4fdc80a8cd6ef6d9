"""The same preparation in use: the recipe of an encoder's training scans, applied to a raw scan that it is given."""
