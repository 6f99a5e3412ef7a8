// The head of the page, and the first tab.

const HEALTH_EVERY_MS = 10000;

async function health() {
  try {
    const now = await call('/health'), refused = now.refused_champion;
    const { name, version, digest } = now.model;
    $('model').textContent = `${name} version ${version}, digest ${digest.slice(0, SHORT)}`;
    const alarm = refused ? `Version ${refused.version} was promoted and is not served: ${refused.reason}` : '';
    if ($('alarm').textContent !== alarm) $('alarm').textContent = alarm;
    if (documentsDigest !== null && now.index.digest !== documentsDigest) loadDocuments();
  } catch (error) { $('alarm').textContent = `Not healthy: ${error.message}`; }
}
for (const part of document.querySelectorAll('[data-for]')) part.hidden = !domain[part.dataset.for];
showAdministrator();
addEventListener('hashchange', () => openTab(location.hash.slice(1)));
openTab(location.hash.slice(1));
health();
setInterval(() => { if (!document.hidden) health(); }, HEALTH_EVERY_MS);
document.addEventListener('visibilitychange', () => { if (!document.hidden) { health(); readLoad(); } });
