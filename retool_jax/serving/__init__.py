"""The engine behind the interfaces of servers."""
