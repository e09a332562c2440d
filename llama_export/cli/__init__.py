"""The command line: one file a command. Parse, call one library function, print."""
