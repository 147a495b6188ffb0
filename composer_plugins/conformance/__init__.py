"""The conformance suite: what an adapter, channel, reader, hint generator or outer loop owes its users, as tests.

Subclass one of the base classes in a test module, give it the one or two methods that it asks for, say what you can
do (`capabilities`), and run `composer-rl conformance MODULE` or plain pytest. Needs `composer-plugins[torch,dev]`.
"""
