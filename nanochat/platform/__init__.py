"""The base of all other packages: paths, files, the environment, processes and devices, the console, errors."""
