"use strict";
// Theme, sorting, copying: what works without the charts.

const root = document.documentElement;

(function theme() {
  const button = document.getElementById("theme");
  const order = ["system", "light", "dark"];
  let chosen = "system";
  try {
    chosen = localStorage.getItem("tokenlab-theme") || "system";
  } catch (error) {
    // A browser may keep nothing for files; the page then follows the system.
  }
  function show() {
    if (chosen === "system") delete root.dataset.theme;
    else root.dataset.theme = chosen;
    button.textContent = `Theme: ${chosen}`;
    document.dispatchEvent(new Event("looks"));
  }
  button.addEventListener("click", () => {
    chosen = order[(order.indexOf(chosen) + 1) % order.length];
    try {
      localStorage.setItem("tokenlab-theme", chosen);
    } catch (error) {
      // As above.
    }
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    document.dispatchEvent(new Event("looks")),
  );
  show();
})();

(function sorting() {
  const table = document.getElementById("arms");
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const key = (row, column) => {
    const text = row.cells[column].dataset.sort;
    return text === undefined ? null : Number(text);
  };
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const first = head.querySelector("button").dataset.kind === "text" ? "ascending" : "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      const sign = order === "ascending" ? 1 : -1;
      heads.forEach((each) => each.setAttribute("aria-sort", each === head ? order : "none"));
      // A row without the number comes last, whichever the order.
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (x - y);
      });
      body.append(...rows);
    });
  });
})();

document.querySelectorAll(".copy").forEach((button) => {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    } catch (error) {
      // Not allowed for this page: the text is selected, so that a key press copies it.
      getSelection().selectAllChildren(code);
    }
  });
});
