"""Live video over HTTP and WebSockets: many streams on one engine. From the wire to the device:

    app, realtime, chat   what clients say and hear
    sessions              one stream: its source, its questions, its journal
    sources, decoder      video as rounds; whatever is decoded is decoded in a process of its own
    scheduler             the one thread that talks to the device: who takes part in which round
"""
