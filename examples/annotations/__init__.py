"""An upload of annotated documents, as PubAnnotation does it: the example that crashes for real.

``python -m examples.annotations INPUT.jsonl`` uploads a file; ``python -m examples.annotations.demo``
makes one first. The modules, in the order in which a document passes through them:

``documents``   reads the file line by line and finds whose document a line is, without decoding it
``tasks``       the Celery app: the child that stores a few documents, the callback that sums up
``parsing``     the parser without a depth limit, which is what kills a child
``validation``  what makes a document invalid, and its normal form
``store``       the application's own two tables
``outcome``     counts what became of the documents
``cli``         the command that ties these together
"""
