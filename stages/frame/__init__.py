"""The frame around every stage: parameters, command line, processes, outputs against their hashes, records."""
