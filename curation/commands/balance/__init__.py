"""What ``select --balance`` does: of the rows of the tables, it keeps fewer of what is frequent.

By **concepts**, captions are searched for the user's **entries**, and an entry with many **matches** keeps some.  By
**clusters**, samples whose features are nearly the same within a **cluster** are dropped but for one.
"""
