function all(open) { document.querySelectorAll("details").forEach(d => d.open = open) }
function reveal() {
  const d = document.getElementById(location.hash.slice(1));
  if (d) d.open = true;
}
addEventListener("hashchange", reveal); reveal();
