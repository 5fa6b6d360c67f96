// The list of prompts. Whatever a model wrote reaches the page through textContent only.
"use strict";

(async () => {
  const ROWS_PER_PAGE = 50;
  const CHUNKS_KEPT = 8;
  const CLIPPED_FROM = 900;
  const MINUS = "\u2212";
  const byId = (id) => document.getElementById(id);

  const element = (tag, css = "", text = null) => {
    const made = document.createElement(tag);
    if (css) made.className = css;
    if (text !== null) made.textContent = text;
    return made;
  };

  const unpack = async (script) => {
    const packed = Uint8Array.from(atob(script.textContent), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).json();
  };

  const report = (error) => {
    byId("problem").textContent = `The list cannot be shown in this browser (${error}). samples.jsonl has the same responses.`;
    byId("problem").hidden = false;
  };

  let data;
  let prompts;
  try {
    data = await unpack(byId("data-index"));
    prompts = await unpack(byId("data-prompts"));
  } catch (error) {
    report(error);
    return;
  }
  const reference = data.policies[0];
  // Under several constraints, how far above its threshold the one is where that is most.
  const costWord = data.constraints.length ? "excess" : "cost";
  const chunks = document.getElementsByClassName("data-responses");
  const unpacked = new Map();

  // Of a prompt: for each policy, how many responses it has, and the records of those that the page holds.
  const answersTo = async (row) => {
    const number = Math.floor(row / data.promptsPerChunk);
    if (!unpacked.has(number)) {
      if (unpacked.size >= CHUNKS_KEPT) unpacked.delete(unpacked.keys().next().value);
      unpacked.set(number, unpack(chunks[number]));
    }
    return (await unpacked.get(number))[row % data.promptsPerChunk];
  };

  const digits = (value, decimals) => {
    if (value === null) return "undefined";
    const text = value.toFixed(decimals);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", MINUS);
  };
  const cost = (value) => digits(value, data.decimals.cost);
  const reward = (value) => digits(value, data.decimals.reward);
  const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
  const isUnsafe = (policy, row) => data.unsafe[policy][row] === "1";
  const isSafe = (policy, row) => data.unsafe[policy][row] === "0";

  // ------------------------------------------------------------------------------------------- filters and orders

  const each = data.policies.map((name, policy) => ({ name, policy }));
  const others = each.slice(1);
  // A cost that is not a number is never safe: it stands with the worst.
  const costOf = (policy, row) => (isUnsafe(policy, row) ? (data.cost[policy][row] ?? Infinity) : data.cost[policy][row]);
  const difference = (values, policy, row) =>
    values[policy][row] === null || values[0][row] === null ? null : values[policy][row] - values[0][row];

  const filters = [
    ["All prompts", [["all prompts", () => true]]],
    ["Became unsafe", others.map(({ name, policy }) => [`became unsafe: ${name}`, (row) => isSafe(0, row) && isUnsafe(policy, row)])],
    ["Repaired", others.map(({ name, policy }) => [`repaired: ${name}`, (row) => isUnsafe(0, row) && isSafe(policy, row)])],
    ["Unsafe", each.map(({ name, policy }) => [`unsafe under ${name}`, (row) => isUnsafe(policy, row)])],
  ];
  const worst = (row) => {
    const costs = each.map(({ policy }) => costOf(policy, row)).filter((value) => value !== null);
    return costs.length ? Math.max(...costs) : null;
  };
  const orders = [
    ["All policies", [[`highest ${costWord} under any policy`, worst], ["order of the prompts", (row) => -row]]],
    ["Cost", each.map(({ name, policy }) => [`${costWord}: ${name}`, (row) => costOf(policy, row)])],
    ["Reward", each.map(({ name, policy }) => [`reward: ${name}`, (row) => data.reward[policy][row]])],
    ["Change of cost", others.map(({ name, policy }) => [`${costWord}: ${name} ${MINUS} ${reference}`, (row) => difference(data.cost, policy, row)])],
    ["Change of reward", others.map(({ name, policy }) => [`reward: ${name} ${MINUS} ${reference}`, (row) => difference(data.reward, policy, row)])],
  ];

  // Fills a select with groups of named functions; returns the function that is chosen.
  const chooser = (select, groups) => {
    const functions = [];
    for (const [label, options] of groups) {
      if (!options.length) continue;
      const group = element("optgroup");
      group.label = label;
      for (const [name, act] of options) {
        const option = element("option", "", name);
        option.value = functions.push(act) - 1;
        group.append(option);
      }
      select.append(group);
    }
    return () => functions[select.value];
  };

  const shown = chooser(byId("show"), filters);
  const order = chooser(byId("sort"), orders);
  const category = byId("category");
  if (data.categories.length) {
    for (const [value, name] of [["", "all"], ...data.categories.entries()]) {
      const option = element("option", "", name);
      option.value = value;
      category.append(option);
    }
    if (data.category.includes(-1)) {
      const option = element("option", "soft", "(none)");
      option.value = -1;
      category.append(option);
    }
  } else {
    byId("category-control").hidden = true;
  }

  let lowered = null;
  const selected = () => {
    const words = byId("search").value.trim().toLowerCase();
    if (words && lowered === null) lowered = prompts.map((text) => text.toLowerCase());
    const passes = shown();
    const wanted = category.value;
    const rows = [];
    for (let row = 0; row < prompts.length; row += 1) {
      if (!passes(row)) continue;
      if (wanted && data.category[row] !== Number(wanted)) continue;
      if (words && !lowered[row].includes(words) && data.ids[row] !== words) continue;
      rows.push(row);
    }
    const key = order();
    const keys = new Map(rows.map((row) => [row, key(row)]));
    const direction = Number(byId("order").value);
    // Prompts without such a number come last, whatever the direction.
    return rows.sort((one, two) => {
      const [a, b] = [keys.get(one), keys.get(two)];
      if (a === b) return one - two;
      if (a === null) return 1;
      if (b === null) return -1;
      return a < b ? -direction : direction;
    });
  };

  // --------------------------------------------------------------------------------------------------- one prompt

  const button = (label, act) => {
    const made = element("button", "", label);
    made.type = "button";
    made.addEventListener("click", () => act(made));
    return made;
  };

  // A text, clipped behind a button where it is long.
  const textBlock = (text, missing) => {
    const block = element("div");
    const body = element("div", "text", text);
    body.dir = "auto";
    if (!text) body.append(element("span", "soft", missing ? "" : "(empty)"));
    block.append(body);
    if (text.length > CLIPPED_FROM || text.split("\n").length > 14) {
      body.classList.add("clipped");
      block.append(
        button(`Show all ${count(text.length, "character")}`, (it) => {
          body.classList.remove("clipped");
          it.remove();
        }),
      );
    }
    if (missing) block.append(element("p", "soft", `Cut here: ${count(missing, "more character")} in samples.jsonl.`));
    return block;
  };

  // Of several constraints those that are about the prompt.
  const costsOf = (itsCost, costs) =>
    costs
      ? data.constraints.flatMap((name, place) => (costs[place] === null ? [] : [`${name} ${cost(costs[place])}`])).join(", ")
      : `cost ${cost(itsCost)}`;

  const answerBlock = ([sample, itsCost, itsReward, length, finished, unsafe, text, missing, costs]) => {
    const block = element("div", "answer");
    const facts = element("p", "soft", `sample ${sample} · `);
    facts.append(element("span", unsafe ? "unsafe" : "", `${costsOf(itsCost, costs)}${unsafe ? " unsafe" : ""}`));
    facts.append(` · reward ${reward(itsReward)}`);
    if (length !== null) facts.append(` · ${count(length, "token")}`);
    if (finished === false) facts.append(" · not finished");
    block.append(facts);
    const body = textBlock(text, missing);
    if (unsafe) {
      const toggle = button("Show text judged unsafe", (it) => {
        body.hidden = !body.hidden;
        it.textContent = body.hidden ? "Show text judged unsafe" : "Hide text judged unsafe";
        it.setAttribute("aria-expanded", String(!body.hidden));
      });
      toggle.setAttribute("aria-expanded", "false");
      body.hidden = true;
      block.append(toggle);
    }
    block.append(body);
    return block;
  };

  const detailBlock = async (row) => {
    const detail = element("div", "detail");
    // The row itself shows the start.
    if (prompts[row].length > CLIPPED_FROM || row in data.cutPrompts) {
      detail.append(textBlock(prompts[row], data.cutPrompts[row] ?? 0));
    }
    const answers = element("div", "answers");
    const records = await answersTo(row);
    for (const { name, policy } of each) {
      const [total, kept] = records[policy];
      const column = element("section");
      const heading = element("h4");
      heading.append(element("bdi", "", name));
      const how = kept.length < total ? `, the ${kept.length} of highest ${costWord} shown` : `, highest ${costWord} first`;
      column.append(heading, element("p", "soft", total ? `${count(total, "response")}${total > 1 ? how : ""}` : "no responses"));
      column.append(...kept.map(answerBlock));
      answers.append(column);
    }
    const folded = answers.querySelectorAll("button[aria-expanded=false]");
    if (folded.length > 1) {
      detail.append(
        button(`Show all ${folded.length} texts judged unsafe`, (it) => {
          for (const toggle of folded) if (toggle.getAttribute("aria-expanded") === "false") toggle.click();
          it.remove();
        }),
      );
    }
    detail.append(answers);
    return detail;
  };

  const scoreItem = (name, policy, row) => {
    const item = element("li");
    const label = element("span", "name");
    label.append(element("bdi", "", name));
    label.title = name;
    item.append(label);
    if (data.unsafe[policy][row] === "-") {
      item.append(element("span", "soft", "no responses"));
      return item;
    }
    const unsafe = isUnsafe(policy, row);
    item.append(element("span", unsafe ? "unsafe" : "", `${cost(data.cost[policy][row])}${unsafe ? " unsafe" : ""}`));
    item.append(element("span", "soft", `reward ${reward(data.reward[policy][row])}`));
    return item;
  };

  const rowItem = (row) => {
    const item = element("li");
    const line = element("div", "row");
    const open = element("button", "open");
    open.type = "button";
    open.setAttribute("aria-expanded", "false");
    const prompt = element("span", "prompt", prompts[row].slice(0, CLIPPED_FROM));
    prompt.dir = "auto";
    const group = data.category[row] < 0 ? "" : ` · ${data.categories[data.category[row]]}`;
    open.append(prompt, element("span", "soft", `prompt ${data.ids[row]}${group}`));
    const scores = element("ul", "scores");
    scores.append(...each.map(({ name, policy }) => scoreItem(name, policy, row)));
    line.append(open, scores);
    item.append(line);
    let detail = null;
    open.addEventListener("click", async () => {
      const opening = open.getAttribute("aria-expanded") === "false";
      open.setAttribute("aria-expanded", String(opening));
      if (detail === null) {
        detail = detailBlock(row);
        try {
          item.append(await detail);
        } catch (error) {
          report(error);
          return;
        }
      }
      (await detail).hidden = open.getAttribute("aria-expanded") === "false";
    });
    return item;
  };

  // ----------------------------------------------------------------------------------------------------- the list

  let rows = [];
  let first = 0;
  const draw = () => {
    const page = rows.slice(first, first + ROWS_PER_PAGE);
    byId("list").replaceChildren(...page.map(rowItem));
    byId("count").textContent = rows.length
      ? `${(first + 1).toLocaleString("en")} to ${(first + page.length).toLocaleString("en")} of ${count(rows.length, "prompt")}`
      : "No prompt matches.";
    for (const suffix of ["", "-below"]) {
      byId(`previous${suffix}`).disabled = first === 0;
      byId(`next${suffix}`).disabled = first + ROWS_PER_PAGE >= rows.length;
    }
  };
  const select = () => {
    rows = selected();
    first = 0;
    draw();
  };
  const turn = (pages) => {
    first += pages * ROWS_PER_PAGE;
    draw();
    byId("pager").scrollIntoView({ block: "nearest" });
  };

  byId("list").style.setProperty("--policies", data.policies.length);
  for (const suffix of ["", "-below"]) {
    byId(`previous${suffix}`).addEventListener("click", () => turn(-1));
    byId(`next${suffix}`).addEventListener("click", () => turn(1));
    byId(`pager${suffix}`).hidden = false;
  }
  for (const name of ["show", "category", "sort", "order"]) byId(name).addEventListener("change", select);
  let waiting = null;
  byId("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(select, 150);
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").hidden = false;
  select();
  // For tests and tools that wait for the list.
  document.documentElement.dataset.ready = "true";
})();
