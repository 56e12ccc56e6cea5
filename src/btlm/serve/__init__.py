"""The engine behind an HTTP API that clients of OpenAI's know, a playground, and vLLM's plug-in.

Nothing loads before it is used: the command line needs only the options.
"""
