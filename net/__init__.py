"""Files from the network: where a link may lead, and downloads that go on where they stopped."""
