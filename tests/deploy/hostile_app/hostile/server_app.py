"""fedprune's own."""

from fedprune.flower import server_app

app = server_app.app  # assigned: Flower looks for it in the source
