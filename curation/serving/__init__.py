"""Model servers that speak HTTP.

A **server API** is what a server speaks (Ollama's or OpenAI's); a **pool** shares requests among servers, each with as
many at once as it sustains; a **registry** is a folder in which servers on other nodes register while they live.
"""
