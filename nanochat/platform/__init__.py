"""What everything else stands on: paths, files, the environment, processes and devices, the console, errors."""
