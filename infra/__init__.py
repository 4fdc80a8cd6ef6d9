"""What the other packages share: settings, the command line, tracking, Ray, ranks and files."""
